alter table ledger drop column model;
drop table journal;
