"""Added loss terms. Each is an nn.Module that reads a frozen DenoisingPass; see `difftrain.batch.Regularizer`."""
