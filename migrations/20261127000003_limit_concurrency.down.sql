drop trigger runs_free_slot on runs;
drop function free_slot();
delete from jobs where kind in ('slot', 'begin');
drop index runs_slots;
alter table runs drop column concurrency_key;
