"""The torch.library operators with their fake implementations and autograd."""
