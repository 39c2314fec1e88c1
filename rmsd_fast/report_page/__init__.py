"""Parts of the report page: reading a run folder, drawings and sections. `rmsd_fast.report` is the program."""
