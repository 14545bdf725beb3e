"""What the chapters need besides the mathematics: figures, the ledger of claims, execution."""
