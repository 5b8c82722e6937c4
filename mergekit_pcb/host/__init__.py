"""Everything that knows mergekit: parameters, the method, and the plan of a whole merge."""
