"""Everything that knows mergekit: parameters, the method, and the plan of a whole merge."""

# Its registry makes the method known, which imports most of these rooms: before one of them is
# half imported itself.
import mergekit.merge_methods.registry  # noqa: F401
