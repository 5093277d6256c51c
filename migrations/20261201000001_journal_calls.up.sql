-- What agents do inside a step, call by call: turns of a model and calls of tools. A call
-- stands here before it is made, and what came of it before it is used, so that whoever
-- takes over from a dead worker buys no answer twice.
create table journal (
    company_id uuid not null,
    -- The key of the work: the same over all tries of it.
    work text not null,
    -- Which turn of the model, from 0.
    turn integer not null,
    -- The turn itself is 0, the calls that it asks for count from 1.
    call integer not null,
    -- The model, or the tool.
    name text not null,
    state text not null check (state in ('begun', 'done', 'failed')),
    -- What the call carried, the same whenever it is repeated.
    key text not null,
    run_id uuid not null,
    step integer not null,
    agent_id uuid,
    -- Which attempt has made it.
    job_id bigint not null,
    lease_epoch bigint not null,
    attempt integer not null,
    -- The work was begun anew with this turn: an attempt before has failed with all that
    -- there was.
    fresh boolean not null default false,
    tries integer not null default 1,
    -- What the model is to be told, the reply of a turn, or why it failed.
    response jsonb,
    cost_nanos bigint not null default 0,
    began_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz,
    primary key (company_id, work, turn, call),
    constraint journal_end check ((state = 'begun') = (ended_at is null))
);
create index journal_run on journal (company_id, run_id);
grant select, insert, update, delete on journal to capx_api, capx_system;
alter table journal enable row level security;
alter table journal force row level security;
create policy everything on journal to capx_system using (true) with check (true);
create policy tenant on journal to capx_api
    using (exists (select from companies c where c.id = journal.company_id));

-- Which model was paid.
alter table ledger add column model text;
