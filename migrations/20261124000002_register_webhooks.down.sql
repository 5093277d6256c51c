drop index dead_letters_reason;
drop index dead_letters_by_id;
alter table accounts drop column operator;
drop table webhooks;
