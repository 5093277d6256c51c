-- A run is looked up by its id alone: one index less to keep for each.
alter table runs drop constraint runs_pkey;
alter table runs add constraint runs_pkey primary key using index runs_by_id;
-- No change of a job stays in its page for the sake of an index, since its state is in
-- their conditions; what was left free was so for nothing.
alter table jobs set (fillfactor = 90);
