-- The kernel: tenants and their configuration, the queue, runs with their
-- checkpoints, events and approvals. States are text with a CHECK, so that a
-- value can be added or taken back without rewriting a type.

create table accounts (
    id uuid primary key,
    name text not null unique,
    tier text not null default 'pro' check (tier in ('starter', 'pro', 'enterprise')),
    credits bigint not null default 10000,
    created_at timestamptz not null default now()
);

create table api_keys (
    id uuid primary key,
    account_id uuid not null references accounts (id),
    company_id uuid,
    name text not null,
    -- SHA-256 of the whole key; the key itself is shown once and never stored.
    hash bytea not null unique check (octet_length(hash) = 32),
    -- The last characters, so that a person can tell keys apart.
    hint text not null,
    live boolean not null,
    scopes text[] not null,
    created_at timestamptz not null default now(),
    revoked_at timestamptz
);
create index api_keys_account on api_keys (account_id, id);

create table companies (
    id uuid primary key,
    account_id uuid not null references accounts (id),
    name text not null,
    description text,
    status text not null check (status in ('provisioning', 'running', 'paused', 'stopped')),
    config jsonb not null default '{}',
    template text,
    -- The policy in the form it was sent, for answers that echo it.
    governance jsonb,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create index companies_account on companies (account_id, id);

create table agents (
    company_id uuid not null,
    id uuid not null,
    role text not null,
    adapter text not null,
    instructions text not null,
    model text,
    budget bigint,
    config jsonb not null default '{}',
    status text not null check (status in ('initializing', 'active', 'paused', 'errored', 'removed')),
    error text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (company_id, id)
);
-- One live agent a role: the role is an address in the API.
create unique index agents_live_role on agents (company_id, role) where status <> 'removed';

create table playbooks (
    company_id uuid not null,
    id uuid not null,
    name text not null,
    description text,
    status text not null check (status in ('active', 'paused', 'archived')),
    tags text[] not null default '{}',
    current_version_id uuid not null,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (company_id, id),
    constraint playbooks_name unique (company_id, name)
);

-- Immutable: a run points at the version it began with.
create table playbook_versions (
    company_id uuid not null,
    id uuid not null,
    playbook_id uuid not null,
    version integer not null,
    yaml text not null,
    content_hash bytea not null,
    created_at timestamptz not null default now(),
    primary key (company_id, id),
    constraint playbook_versions_number unique (company_id, playbook_id, version)
);

-- What is ready, leased or due later; nothing else. Narrow and hot: no
-- payload, no history. A finished job is a deleted row.
create table jobs (
    id bigint generated always as identity primary key,
    queue text not null,
    kind text not null,
    company_id uuid not null,
    -- What the job is about: a run for a step, a company for its provisioning.
    ref_id uuid,
    step integer not null default 0,
    -- Lower is taken earlier, within a company.
    priority smallint not null default 0,
    state text not null check (state in ('ready', 'scheduled', 'running')),
    due_at timestamptz not null default now(),
    -- Raised by every claim and every commit that keeps the row, never reset.
    lease_epoch bigint not null default 0,
    session_id bigint,
    deadline_at timestamptz,
    timeout_ms bigint not null default 3600000 check (timeout_ms > 0),
    -- Tries charged for the current step; charged at the claim.
    attempt integer not null default 0,
    -- Deaths of a worker since the last checkpoint.
    crash_count smallint not null default 0,
    unique_key text,
    created_at timestamptz not null default now(),
    -- A running row always has somebody who can be found dead, and a time at
    -- which it is taken away even when nobody is.
    constraint jobs_running_is_held check (
        (state = 'running') = (session_id is not null and deadline_at is not null)
    )
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02,
        autovacuum_vacuum_threshold = 2000, autovacuum_analyze_scale_factor = 0.05);

-- The claim: only runnable rows, by queue, then company, so that a fair claim
-- is a loose index scan.
create index jobs_ready on jobs (queue, company_id, priority, id) where state = 'ready';
-- The timers: rows whose time has not come cost nothing.
create index jobs_scheduled on jobs (due_at) where state = 'scheduled';
-- The sweep: what runs, by the session that holds it.
create index jobs_running on jobs (session_id) where state = 'running';
create unique index jobs_unique_key on jobs (company_id, unique_key) where unique_key is not null;

-- One row a worker process, beaten by one statement: the lease of everything
-- that the process runs. A session that is dead is never renewed.
create table worker_sessions (
    id bigint generated always as identity primary key,
    worker text not null,
    version text not null,
    queues text[] not null,
    slots integer not null,
    lease_ms bigint not null check (lease_ms > 0),
    state text not null check (state in ('active', 'draining', 'ended', 'dead')),
    started_at timestamptz not null default clock_timestamp(),
    beat_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz,
    constraint worker_sessions_end check ((state in ('ended', 'dead')) = (ended_at is not null))
) with (fillfactor = 50);
create index worker_sessions_open on worker_sessions (id) where ended_at is null;

create table runs (
    company_id uuid not null,
    id uuid not null,
    playbook_id uuid not null,
    version_id uuid not null,
    -- The one job that moves the run on, as long as it is open.
    job_id bigint not null,
    status text not null check (status in ('queued', 'running', 'suspended', 'completed', 'failed', 'cancelled')),
    trigger text not null,
    params jsonb not null,
    -- The next event's number within the run, taken under the row's lock.
    event_seq bigint not null default 0,
    cost_nanos bigint not null default 0,
    waiting_on jsonb,
    output jsonb,
    error jsonb,
    created_at timestamptz not null default now(),
    started_at timestamptz,
    ended_at timestamptz,
    primary key (company_id, id),
    constraint runs_end check ((status in ('completed', 'failed', 'cancelled')) = (ended_at is not null)),
    -- Nothing waits that cannot say for what.
    constraint runs_wait check ((status = 'suspended') = (waiting_on is not null))
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
-- Not by company first: for an empty table the planner could prefer it to the
-- primary key, and a pinned plan would then walk all runs of the company.
create index runs_playbook on runs (playbook_id, id);
-- For commits, which look up many runs at once by what is a lookup in any case,
-- and for whoever knows a run's id and not its company. After the other one: of
-- two that cost the same in an empty table the planner takes the later.
create unique index runs_by_id on runs (id);

-- The transition table of domain::run, as what it forbids; a condition costs
-- next to nothing, the function runs only to refuse.
create function refuse_transition() returns trigger language plpgsql as $$
begin
    raise exception 'a row of % never goes from % to %', tg_table_name, old.status, new.status
        using errcode = 'check_violation', constraint = tg_name;
end $$;
create trigger runs_transitions before update on runs for each row
    when (
        old.status in ('completed', 'failed', 'cancelled')
        or (new.status = 'queued' and old.status <> 'queued')
        or (new.status = 'completed' and old.status <> 'running')
    )
    execute function refuse_transition();

-- One checkpoint a step. A step that has not begun has no row.
create table run_steps (
    company_id uuid not null,
    run_id uuid not null,
    step integer not null,
    status text not null check (status in ('pending', 'running', 'waiting', 'pending_approval', 'completed', 'failed', 'skipped', 'cancelled')),
    agent_id uuid,
    attempt integer not null default 0,
    -- The job and epoch whose commit wrote the row: evidence, and the answer
    -- to "did my commit land?".
    job_id bigint,
    lease_epoch bigint,
    cost_nanos bigint not null default 0,
    output jsonb,
    error jsonb,
    started_at timestamptz,
    ended_at timestamptz,
    primary key (company_id, run_id, step)
);

-- The activity log: the source of streams and webhooks. Append-only.
create table events (
    company_id uuid not null,
    -- Readers go by (xid, id) below pg_snapshot_xmin, so that an event which
    -- commits late is late and never skipped.
    xid xid8 not null default pg_current_xact_id(),
    id uuid not null,
    run_id uuid,
    seq bigint,
    event text not null,
    data jsonb not null,
    at timestamptz not null default clock_timestamp(),
    primary key (company_id, xid, id)
);
create unique index events_run on events (company_id, run_id, seq) where run_id is not null;

create table approvals (
    company_id uuid not null,
    id uuid not null,
    run_id uuid not null,
    step integer not null,
    job_id bigint not null,
    status text not null check (status in ('pending', 'approved', 'rejected', 'expired', 'cancelled')),
    agent_id uuid,
    role text,
    action text not null,
    playbook text not null,
    step_name text not null,
    context jsonb not null,
    -- SHA-256 of what the approver is shown; the decision binds it.
    digest bytea not null,
    proposed_at timestamptz not null default now(),
    expires_at timestamptz not null,
    decided_at timestamptz,
    decided_by text,
    note text,
    primary key (company_id, id),
    constraint approvals_gate unique (company_id, run_id, step),
    constraint approvals_decided check ((status = 'pending') = (decided_at is null))
);
create index approvals_by_id on approvals (id);

-- Work that gave up, with the evidence: out of tries, or too many deaths.
create table dead_letters (
    company_id uuid not null,
    id uuid not null,
    queue text not null,
    kind text not null,
    ref_id uuid,
    step integer not null,
    reason text not null check (reason in ('exhausted', 'invalid', 'quarantined')),
    attempt integer not null,
    crash_count integer not null,
    error jsonb not null,
    created_at timestamptz not null default now(),
    primary key (company_id, id)
);
