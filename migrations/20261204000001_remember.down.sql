alter table messages drop column call_key;
alter table tasks drop column call_key, drop column parent_id;
drop table memories;
