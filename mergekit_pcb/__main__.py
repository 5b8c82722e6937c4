"""``python -m mergekit_pcb`` is ``mergekit-pcb``."""

from mergekit_pcb.tools.cli import main

main(prog_name="mergekit-pcb")
