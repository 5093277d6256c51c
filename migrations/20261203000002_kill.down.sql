alter table playbooks drop column killed_at;
alter table companies drop column killed_at;
