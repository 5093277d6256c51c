-- What is done for all from time to time: each part by one worker at a time, who claims it.
create table upkeep (
    part text primary key,
    due_at timestamptz not null default now(),
    -- Raised by every claim.
    epoch bigint not null default 0,
    -- Where it goes on, of a part that takes more than one turn.
    place uuid,
    done_at timestamptz,
    failures integer not null default 0,
    error text
);

-- How long what is over is kept, in days, as the operator has it.
create table retention (
    what text primary key check (what in ('runs', 'failed_runs', 'activity', 'deliveries', 'failed_deliveries')),
    days integer not null check (days > 0),
    set_by text not null,
    set_at timestamptz not null default now()
);

-- What went through each queue, by the minute.
create table queue_counts (
    queue text not null,
    minute timestamptz not null,
    done bigint not null default 0,
    again bigint not null default 0,
    primary key (queue, minute)
);
create index queue_counts_minute on queue_counts (minute);

-- What is less urgent than the rest, or more: both are rare.
create index jobs_low on jobs (due_at) where state = 'ready' and priority > 0;
create index jobs_high on jobs (queue, flow_id) where state = 'ready' and priority < 0;

-- To see how long the oldest transaction is open, whoever has it.
do $$
begin
    grant pg_read_all_stats to capx_system;
exception when insufficient_privilege then
    raise notice 'the metric capx_oldest_snapshot_seconds sees nothing: let an administrator grant pg_read_all_stats to capx_system';
end $$;

-- Who paused what, and why; gone once it goes on.
create table pauses (
    company_id uuid not null,
    kind text not null check (kind in ('company', 'playbook', 'agent')),
    id uuid not null,
    paused_by text not null,
    reason text,
    since timestamptz not null default now(),
    primary key (company_id, kind, id)
);

-- Dead letters that are tried again, so many a second.
create table redrives (
    id uuid primary key,
    account_id uuid not null references accounts (id),
    company_id uuid,
    reason text,
    fingerprint text,
    rate integer not null check (rate > 0),
    asked_by text not null,
    status text not null default 'running' check (status in ('running', 'done', 'cancelled')),
    -- The last letter that was looked at; newer ones than the redrive are not its.
    beyond uuid,
    retried bigint not null default 0,
    refused bigint not null default 0,
    last_refusal text,
    created_at timestamptz not null default now(),
    ended_at timestamptz,
    constraint redrives_ended check ((status = 'running') = (ended_at is null))
);
create index redrives_account on redrives (account_id, id);
create index redrives_running on redrives (id) where status = 'running';

grant select, insert, update, delete on upkeep, retention, queue_counts, pauses, redrives to capx_api, capx_system;
do $$
declare
    name text;
begin
    foreach name in array array['upkeep', 'retention', 'queue_counts', 'pauses', 'redrives'] loop
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy everything on %I to capx_system using (true) with check (true)', name);
    end loop;
end $$;
create policy tenant on pauses to capx_api using (exists (select from companies c where c.id = pauses.company_id));
-- How long the server keeps things is no secret.
create policy anybody on retention for select to capx_api using (true);
create policy tenant on redrives to capx_api
    using (account_id = nullif(current_setting('capx.account', true), '')::uuid
        and (nullif(current_setting('capx.company', true), '') is null
            or company_id = nullif(current_setting('capx.company', true), '')::uuid));
