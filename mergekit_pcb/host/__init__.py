"""Everything that knows mergekit: parameters, the method, and the plan of a whole merge."""

# mergekit's registry imports the method, and with it most modules here. It comes first, before one
# of them is half imported itself.
import mergekit.merge_methods.registry  # noqa: F401
