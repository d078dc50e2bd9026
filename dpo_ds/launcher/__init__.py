"""Starting ranks on nodes. Standard library only, so that it starts at once and can be imported anywhere."""
