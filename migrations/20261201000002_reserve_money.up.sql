-- What is spent and reserved, by whom and in which period: what a call may cost is reserved
-- here before it is made, under the locks of all that it counts for.
create table budgets (
    company_id uuid not null,
    scope text not null check (scope in ('company', 'agent', 'playbook', 'run', 'step')),
    ref_id uuid not null,
    -- The step of a run, else -1.
    step integer not null,
    period text not null check (period in ('day', 'month', 'all')),
    -- The first day, in the company's time zone; 1970-01-01 where there is no period.
    starts date not null,
    spent_nanos bigint not null default 0,
    reserved_nanos bigint not null default 0,
    -- The highest threshold that was told, in percent.
    told smallint not null default 0,
    primary key (company_id, scope, ref_id, step, period, starts)
) with (fillfactor = 70);
grant select, insert, update, delete on budgets to capx_api, capx_system;
alter table budgets enable row level security;
alter table budgets force row level security;
create policy everything on budgets to capx_system using (true) with check (true);
create policy tenant on budgets to capx_api
    using (exists (select from companies c where c.id = budgets.company_id));

alter table journal
    -- What the call may cost, while nobody knows what it has.
    add column reserved_nanos bigint not null default 0,
    -- What calls of it before may have cost, of which nobody ever heard.
    add column kept_nanos bigint not null default 0,
    -- The periods that it was reserved in.
    add column day date,
    add column month date;
-- The calls that hold money.
create index journal_reserved on journal (company_id) where reserved_nanos > 0;

alter table agents
    -- Why it is paused, where nobody has asked for it: `budget`.
    add column paused_by text,
    -- In words.
    add column paused_reason text,
    -- When it goes on by itself.
    add column paused_until timestamptz,
    -- The most that one of its calls has cost, where its endpoint names no price.
    add column dearest_nanos bigint,
    add constraint agents_paused check (status = 'paused' or paused_by is null);

-- The agent that a job waits for: who lets it go on makes the job due.
alter table jobs add column held_for uuid;
create index jobs_held on jobs (company_id, held_for) where held_for is not null;
