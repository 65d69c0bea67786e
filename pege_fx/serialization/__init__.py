"""Files: checkpoints of training, deployed models, and the safe containers that both use."""
