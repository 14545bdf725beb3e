"""Where the images come from, and the mini-batches that they become."""
