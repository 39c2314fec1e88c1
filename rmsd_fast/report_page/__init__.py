"""Parts of the report page: run folder, drawings and sections. `rmsd_fast.report` is the program."""
