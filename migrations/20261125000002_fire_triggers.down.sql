drop index runs_dedup;
alter table runs drop column dedup_key;
drop index playbooks_lagging;
alter table playbooks drop column triggers_of;
drop table triggers;
