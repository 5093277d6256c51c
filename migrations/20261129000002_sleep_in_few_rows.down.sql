alter table jobs set (fillfactor = 70);
alter table runs drop constraint runs_pkey;
alter table runs add primary key (company_id, id);
create unique index runs_by_id on runs (id);
