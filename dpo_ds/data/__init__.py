"""Text, ids, lengths and order: from a row to a batch. No network and no rank may enter."""
