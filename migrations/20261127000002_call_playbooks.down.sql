drop trigger runs_wake_caller on runs;
drop function wake_caller();
drop table run_children;
alter table runs drop column depth;
alter table runs drop column called;
