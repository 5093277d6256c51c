drop index jobs_held;
alter table jobs drop column held_for;
alter table agents
    drop constraint agents_paused,
    drop column paused_by,
    drop column paused_reason,
    drop column paused_until,
    drop column dearest_nanos;
alter table journal
    drop column reserved_nanos,
    drop column kept_nanos,
    drop column day,
    drop column month;
drop table budgets;
