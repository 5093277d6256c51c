-- What the REST API needs beside the kernel: limits that hold over all its
-- processes, answers that can be given again, tasks, a ledger with its
-- roll-ups, and row-level security as the second wall between tenants.

create table tiers (
    name text primary key,
    rate_per_minute integer not null,
    burst_per_second integer not null,
    concurrent integer not null
);
insert into tiers values ('starter', 60, 10, 5), ('pro', 300, 50, 20), ('enterprise', 600000, 20000, 10000);

-- A tier's limits, where an account has others than its tier; and the two
-- buckets that they fill, as of metered_at. All in one row, so that one
-- statement under its lock decides.
alter table accounts
    add column rate_per_minute integer check (rate_per_minute > 0),
    add column burst_per_second integer check (burst_per_second > 0),
    add column concurrent integer check (concurrent > 0),
    add column minute_tokens double precision not null default 0,
    add column second_tokens double precision not null default 0,
    -- Long ago: the buckets of a new account are full.
    add column metered_at timestamptz not null default to_timestamp(0),
    -- What each API process holds of the account's concurrent requests:
    -- {process: [slots, until when, in epoch seconds]}.
    add column slots jsonb not null default '{}';
alter table accounts set (fillfactor = 50);

-- Answers to requests that carried an Idempotency-Key, written by the
-- transaction of their effect.
create table idempotency_keys (
    api_key_id uuid not null,
    path text not null,
    idempotency_key text not null,
    -- SHA-256 of method and body: the same key for something else is refused.
    request_hash bytea not null check (octet_length(request_hash) = 32),
    status smallint not null,
    body text not null,
    created_at timestamptz not null default now(),
    primary key (api_key_id, path, idempotency_key)
);
create index idempotency_keys_created on idempotency_keys (created_at);

create table tasks (
    company_id uuid not null,
    id uuid not null,
    agent_id uuid,
    title text not null,
    description text,
    status text not null check (status in ('pending', 'pending_approval', 'in_progress', 'completed', 'rejected', 'failed', 'cancelled')),
    priority text not null check (priority in ('low', 'medium', 'high', 'critical')),
    metadata jsonb not null default '{}' constraint metadata_size check (octet_length(metadata::text) <= 65536),
    -- What a person said, where a person has the last word.
    approval text check (approval in ('pending', 'approved', 'rejected', 'cancelled')),
    -- The person's word, the agent's, and what went wrong.
    feedback text,
    approved_at timestamptz,
    result jsonb,
    error jsonb,
    run_id uuid,
    cost_nanos bigint not null default 0,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    ended_at timestamptz,
    primary key (company_id, id),
    constraint tasks_end check ((status in ('completed', 'rejected', 'failed', 'cancelled')) = (ended_at is not null))
);
create unique index tasks_by_id on tasks (id);
create index tasks_agent on tasks (company_id, agent_id, id);
create index tasks_status on tasks (company_id, status, id);
create index tasks_priority on tasks (company_id, priority, id);
create index tasks_approval on tasks (company_id, approval, id) where approval is not null;
create index tasks_asked on tasks (company_id, id) where approval is not null;

-- Money spent, an entry a spend, for ever. The cost of a step is written by
-- its commit.
create table ledger (
    company_id uuid not null,
    id bigint generated always as identity,
    at timestamptz not null default clock_timestamp(),
    category text not null check (category in ('inference', 'tools', 'storage', 'heartbeat', 'rubric')),
    nanos bigint not null check (nanos >= 0),
    agent_id uuid,
    run_id uuid,
    step integer,
    primary key (company_id, at, id)
);

-- Roll-ups. Whoever writes a truth adds a narrow row to a table of deltas, in
-- the same statement; workers fold those into the sums from time to time, and
-- who reads adds what is not folded yet. So no hot row is updated by every
-- commit, and no list counts what it shows.
create table cost_deltas (
    id bigint generated always as identity primary key,
    company_id uuid not null,
    at timestamptz not null,
    -- The zero id: nobody's.
    agent_id uuid not null,
    category text not null,
    nanos bigint not null
);
create index cost_deltas_company on cost_deltas (company_id);

-- By quarters of an hour: every time zone's days begin at one.
create table cost_rollups (
    company_id uuid not null,
    quarter timestamptz not null,
    agent_id uuid not null,
    category text not null,
    nanos bigint not null,
    primary key (company_id, quarter, agent_id, category)
);

-- Since the beginning.
create table cost_totals (
    company_id uuid not null,
    agent_id uuid not null,
    category text not null,
    nanos bigint not null,
    primary key (company_id, agent_id, category)
);

create table run_deltas (
    id bigint generated always as identity primary key,
    company_id uuid not null,
    playbook_id uuid not null,
    started integer not null,
    ended integer not null,
    cost_nanos bigint not null,
    duration_ms bigint not null,
    last_run_at timestamptz
);
create index run_deltas_playbook on run_deltas (company_id, playbook_id);

create table run_totals (
    company_id uuid not null,
    playbook_id uuid not null,
    started bigint not null,
    ended bigint not null,
    cost_nanos bigint not null,
    duration_ms bigint not null,
    last_run_at timestamptz,
    primary key (company_id, playbook_id)
);

-- Shown in lists, which read no YAML.
alter table playbook_versions add column step_count integer not null default 0;

-- Beats of agents, counted where they are shown. What is merged has a size: it
-- is read with every run's first claim.
alter table agents
    add constraint config_size check (octet_length(config::text) <= 65536),
    add column heartbeat_count bigint not null default 0,
    add column last_heartbeat_at timestamptz;

-- Where a company was before it was paused is where it goes on: no need to
-- store it, it was running. When, is shown.
alter table companies
    add constraint config_size check (octet_length(config::text) <= 65536),
    add column paused_at timestamptz,
    add column stopped_at timestamptz;

-- Work of a company that is halted waits without a time; a worker that comes
-- upon it puts it there, and whoever lets the company go on takes it back.
create index jobs_parked on jobs (company_id) where due_at = 'infinity';

-- Lists of an account over all its companies.
create index playbooks_by_id on playbooks (id);

-- Lists by a status that few have.
create index runs_open on runs (playbook_id, id) where ended_at is null;
create index runs_unsuccessful on runs (playbook_id, status, id) where status in ('failed', 'cancelled');
create index approvals_status on approvals (company_id, status, id);

-- The feeds. What is rare has an index of its own by its kind; steps and runs,
-- which are most of the log, are found in its order and cost nothing more. In
-- columns, since under row-level security no expression's index is used whose
-- function might leak what it saw.
alter table events
    add column rare_kind text generated always as (
        case when split_part(event, '.', 1) in ('step', 'playbook', 'rubric') then null else split_part(event, '.', 1) end
    ) stored,
    add column agent text generated always as (data ->> 'agent_id') stored;
create index events_rare on events (company_id, rare_kind, xid, id) where rare_kind is not null;
create index events_agent on events (company_id, agent, xid, id) where agent is not null;

-- From time to time the bounds of the transactions that are open: what was
-- written after a mark is not below its oldest, what was written before is below
-- its newest. So a range of times is a range of the log.
create table event_marks (
    at timestamptz primary key default clock_timestamp(),
    oldest xid8 not null default pg_snapshot_xmin(pg_current_snapshot()),
    newest xid8 not null default pg_snapshot_xmax(pg_current_snapshot())
);

-- A run's id names it alone. Behind the company, a plan made for a small table
-- took the company's part of this index for the whole lookup.
alter table approvals drop constraint approvals_gate, add constraint approvals_gate unique (run_id, step);

-- The second wall. The API's statements run as capx_api, which owns nothing
-- and sees what belongs to the account that its transaction names; everything
-- else runs as capx_system. Roles belong to the whole server, so they may be
-- there already, or come to be at this moment by a migration of another of its
-- databases.
do $$
declare
    wanted text;
begin
    foreach wanted in array array['capx_api', 'capx_system'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            begin
                execute format('create role %I nologin nobypassrls', wanted);
            exception
                when duplicate_object or unique_violation then null;
                when insufficient_privilege then
                    raise exception 'the role % does not exist, and % may not create it', wanted, current_user
                        using hint = format('let an administrator run: create role %I nologin; grant %I to %I', wanted, wanted, current_user);
            end;
        end if;
        if not pg_has_role(current_user, wanted, 'member') then
            execute format('grant %I to %I', wanted, current_user);
        end if;
        execute format('grant usage on schema %I to %I', current_schema(), wanted);
        execute format('grant select, insert, update, delete on all tables in schema %I to %I', current_schema(), wanted);
        execute format('grant usage on all sequences in schema %I to %I', current_schema(), wanted);
    end loop;
end $$;
revoke all on worker_sessions from capx_api;
do $$
begin
    -- The history of migrations is there when sqlx migrates.
    if to_regclass('_sqlx_migrations') is not null then
        revoke all on _sqlx_migrations from capx_api, capx_system;
        grant select on _sqlx_migrations to capx_api, capx_system;
    end if;
end $$;
revoke insert, update, delete on event_marks, tiers from capx_api;

do $$
declare
    -- Tables of a company: seen by who sees the company.
    of_company text[] := array[
        'agents', 'playbooks', 'playbook_versions', 'jobs', 'runs', 'run_steps', 'events', 'approvals',
        'dead_letters', 'tasks', 'ledger', 'cost_deltas', 'cost_rollups', 'cost_totals', 'run_deltas', 'run_totals'
    ];
    name text;
begin
    foreach name in array of_company || array['accounts', 'api_keys', 'companies', 'idempotency_keys', 'worker_sessions'] loop
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy everything on %I to capx_system using (true) with check (true)', name);
    end loop;
    foreach name in array of_company loop
        -- The policy of companies decides.
        execute format(
            'create policy tenant on %I to capx_api using (exists (select from companies c where c.id = %I.company_id))',
            name, name
        );
    end loop;
end $$;
-- capx.account is whom the transaction serves, capx.company the one company that
-- the caller's key is bound to, if it is. Not set, they are null, and nothing is
-- seen. Written out, since a function would be read and inlined by every plan.
create policy tenant on accounts to capx_api
    using (id = nullif(current_setting('capx.account', true), '')::uuid);
create policy tenant on companies to capx_api
    using (account_id = nullif(current_setting('capx.account', true), '')::uuid
        and id = coalesce(nullif(current_setting('capx.company', true), '')::uuid, id));
create policy tenant on api_keys to capx_api
    using (account_id = nullif(current_setting('capx.account', true), '')::uuid
        and (nullif(current_setting('capx.company', true), '') is null
            or company_id = nullif(current_setting('capx.company', true), '')::uuid));
create policy tenant on idempotency_keys to capx_api
    using (exists (select from api_keys k where k.id = idempotency_keys.api_key_id));
