-- What a run keeps of what its steps and items have said, in bytes: at least as much as
-- it is, since a loop says things anew.
alter table runs add column bytes bigint not null default 0;
-- The same with what the items have said so far.
alter table run_fans add column bytes bigint not null default 0;
-- Of the output; null in rows of before.
alter table run_steps add column bytes integer;
