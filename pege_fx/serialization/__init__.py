"""Files: checkpoints of training, deployed models, and the codec of both."""
