"""The gated delta rule, a linear attention whose state forgets and corrects itself."""
