"""The parts of the report page: reading a run folder, drawings, sections. `rmsd_fast.report` is the program."""
