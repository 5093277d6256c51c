drop trigger runs_tell_agent on runs;
drop function tell_agent();
drop table messages;
alter table runs drop column beat_of;
drop index tasks_needed;
drop index tasks_of_run;
alter table tasks drop column needs, drop column created_by;
alter table agents
    drop column beat_at, drop column beat_began_at, drop column beat_reasons, drop column beat_run,
    drop column beat_items, drop column beat_actions, drop column beat_cost_nanos, drop column wakes;
delete from jobs where kind = 'heartbeat';
alter table playbooks drop column builtin;
