drop table run_artifacts;
drop table artifact_chunks;
drop table artifacts;
