drop table run_items;
drop table run_fans;
delete from jobs where kind = 'item';
alter table jobs drop column item;
