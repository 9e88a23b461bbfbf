"""What a device could do at best: operations and bytes counted from a graph, over rates measured in the same run."""
