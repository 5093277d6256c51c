-- The lanes of a fan are jobs that were made together, so that the first and the
-- last one tell them from those of a fan that the step had before a retry.
alter table run_fans
    add column first_lane bigint not null default 0,
    add column last_lane bigint not null default 9223372036854775807;

-- How large the output is as text; where it is not known it is printed to learn it.
alter table run_items add column bytes integer;
