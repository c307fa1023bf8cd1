"""Public torch checkpoints to weight folders of this project, and back."""
