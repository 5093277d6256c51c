-- What a person is asked about a task, as their company's policy was then: until when, who may
-- decide, and what is decided without.
create table task_asks (
    company_id uuid not null,
    task_id uuid not null,
    asked_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    on_timeout text not null check (on_timeout in ('reject', 'approve', 'escalate')),
    -- By the names or ids of keys; anybody with the scope without.
    reviewers text[],
    -- When anybody may decide, where nobody has,
    escalates_at timestamptz,
    -- and since when anybody may.
    escalated_at timestamptz,
    -- Of how much of its time people were reminded, in percent.
    reminded smallint not null default 0,
    decided_at timestamptz,
    decided_by text,
    primary key (company_id, task_id)
);
create index task_asks_open on task_asks (expires_at) where decided_at is null;
grant select, insert, update, delete on task_asks to capx_api, capx_system;
alter table task_asks enable row level security;
alter table task_asks force row level security;
create policy everything on task_asks to capx_system using (true) with check (true);
create policy tenant on task_asks to capx_api
    using (exists (select from companies c where c.id = task_asks.company_id));
-- Those that wait already have a day from now on.
insert into task_asks (company_id, task_id, expires_at, on_timeout)
select company_id, id, clock_timestamp() + interval '24 hours', 'reject' from tasks where status = 'pending_approval';
-- The calls that are under way.
create index journal_begun on journal (company_id) where state = 'begun';
