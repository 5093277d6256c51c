-- Named events that clients send, and the runs that wait for them.

create table signals (
    company_id uuid not null,
    id uuid not null,
    -- To one run alone, or to every run that waits for it.
    run_id uuid,
    name text not null,
    data jsonb not null,
    -- The sender's own id: the same again changes nothing.
    client_id text,
    received_at timestamptz not null default clock_timestamp(),
    primary key (company_id, id)
);
create unique index signals_client on signals (company_id, client_id) where client_id is not null;
create index signals_name on signals (company_id, name, received_at, id);
create index signals_received on signals (received_at);

create table waits (
    company_id uuid not null,
    run_id uuid not null,
    step integer not null,
    -- The job that ends the wait: at its time, or when the event has come.
    job_id bigint not null,
    name text not null,
    -- What the event's data must hold.
    match jsonb not null,
    -- What has come.
    signal_id uuid,
    data jsonb,
    primary key (run_id, step),
    constraint waits_delivered check ((signal_id is null) = (data is null))
);
create index waits_open on waits (company_id, name, job_id) where signal_id is null;

-- An event counts once for each run.
create table signals_taken (
    company_id uuid not null,
    run_id uuid not null,
    signal_id uuid not null,
    primary key (signal_id, run_id)
);

do $$
declare
    name text;
begin
    foreach name in array array['signals', 'waits', 'signals_taken'] loop
        execute format('grant select, insert, update, delete on %I to capx_api, capx_system', name);
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy everything on %I to capx_system using (true) with check (true)', name);
        execute format(
            'create policy tenant on %I to capx_api using (exists (select from companies c where c.id = %I.company_id))',
            name, name
        );
    end loop;
end $$;
