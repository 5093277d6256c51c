-- Whose share of a queue a job is taken from: its company's, or that of the webhook that it is
-- sent to, so that one that answers nothing holds up no other.
alter table jobs add column webhook_id uuid;
alter table jobs add column flow_id uuid generated always as (coalesce(webhook_id, company_id)) stored;
drop index jobs_ready;
create index jobs_ready on jobs (queue, flow_id, priority, id) where state = 'ready';
-- A slot is a row that runs: counted, never booked, so that none leaks. Of deliveries alone: to
-- keep it for all costs every claim a seventh, and of others who are limited what runs is counted
-- through, which is no more than the fleet has slots.
create index jobs_sending on jobs (webhook_id) where state = 'running' and webhook_id is not null;

-- What bounds a share. One without a row is bounded by nothing.
create table flows (
    queue text not null,
    webhook_id uuid references webhooks (id) on delete cascade,
    company_id uuid,
    flow_id uuid not null generated always as (coalesce(webhook_id, company_id)) stored,
    -- Raised by whoever takes from it, so that no two take what only one may.
    version bigint not null default 0,
    -- So many at once, as somebody has set it.
    max_running integer check (max_running > 0),
    -- So many a second, with as many kept from a second without.
    rate double precision check (rate > 0),
    tokens double precision not null default 0,
    tokens_at timestamptz not null default now(),
    -- So many at once, as it was found that the other side bears.
    bears integer check (bears > 0),
    -- Failures in a row, how often the breaker has opened in a row, and until when it is open;
    -- then one is taken, to probe.
    failures integer not null default 0,
    opened integer not null default 0,
    open_until timestamptz,
    -- The share of what failed lately, and how many retries may go while it is high.
    error_rate double precision not null default 0,
    retry_budget double precision not null default 0,
    noted_at timestamptz not null default now(),
    -- Nothing has worked since.
    failing_since timestamptz,
    primary key (queue, flow_id),
    constraint flows_of_one check (num_nonnulls(webhook_id, company_id) = 1)
) with (fillfactor = 50);
create index flows_webhook on flows (webhook_id) where webhook_id is not null;
insert into flows (queue, webhook_id, bears) select 'webhooks', id, 8 from webhooks;
-- Whoever registers one, of whatever version.
create function bound_webhook() returns trigger language plpgsql as $$
begin
    insert into flows (queue, webhook_id, bears) values ('webhooks', new.id, 8) on conflict do nothing;
    return null;
end $$;
create trigger webhooks_are_bound after insert on webhooks for each row execute function bound_webhook();
-- What waits for an agent, or for a webhook, found by that alone.
create index jobs_held_for on jobs (held_for) where held_for is not null;

alter table webhooks
    -- Events of a run, and those of a company that belong to none, one after another.
    add column ordered boolean not null default false;

-- An event on its way to a webhook. Its id is made of both, so that there is one of each pair.
create table deliveries (
    webhook_id uuid not null,
    id uuid not null,
    company_id uuid not null,
    event text not null,
    event_id uuid not null,
    -- Where the event stands; a test has none, and brings its data.
    event_xid xid8,
    data jsonb,
    status text not null default 'pending' check (status in ('pending', 'succeeded', 'failed')),
    -- Its job, while it is pending.
    job_id bigint,
    attempts integer not null default 0,
    -- What was answered last, or why nothing was.
    last_status integer,
    last_error text,
    created_at timestamptz not null default now(),
    ended_at timestamptz,
    failed_at timestamptz,
    primary key (webhook_id, id),
    constraint deliveries_event check ((event_xid is null) = (data is not null)),
    constraint deliveries_pending check ((status = 'pending') = (job_id is not null)),
    constraint deliveries_ended check ((status = 'pending') = (ended_at is null)),
    constraint deliveries_failed check ((status = 'failed') = (failed_at is not null))
) with (fillfactor = 80);
-- Not by status: who succeeds stays where it is.
create index deliveries_failed_ones on deliveries (webhook_id, id) where failed_at is not null;

create table delivery_attempts (
    webhook_id uuid not null,
    delivery_id uuid not null,
    number integer not null,
    at timestamptz not null default clock_timestamp(),
    -- Of the answer, where there was one.
    status integer,
    latency_ms integer not null,
    -- How it begins.
    answer text check (octet_length(answer) <= 2048 * 3),
    error text,
    primary key (webhook_id, delivery_id, number)
);

-- What is still to come of an ordered webhook's events about one thing.
create table delivery_order (
    webhook_id uuid not null,
    about uuid not null,
    job_id bigint not null,
    primary key (webhook_id, about, job_id)
);

alter table dead_letters
    add column webhook_id uuid,
    -- The same over all that failed for the same reason: what differs from one to the next is left out.
    add column fingerprint text generated always as (left(md5(
        kind || ' ' || coalesce(error ->> 'class', '') || ' '
        || regexp_replace(coalesce(error ->> 'message', ''), '[a-z]+_[0-9a-z]{26}|[0-9a-f-]{8,}|[0-9]+|"[^"]*"|`[^`]*`', '#', 'g')
    ), 16)) stored;
create index dead_letters_fingerprint on dead_letters (company_id, fingerprint, id);

grant select, insert, update, delete on flows, deliveries, delivery_attempts, delivery_order to capx_api, capx_system;

do $$
declare
    name text;
begin
    foreach name in array array['flows', 'deliveries', 'delivery_attempts', 'delivery_order'] loop
        execute format('alter table %I enable row level security', name);
        execute format('alter table %I force row level security', name);
        execute format('create policy everything on %I to capx_system using (true) with check (true)', name);
        -- The policy of webhooks decides.
        execute format(
            'create policy tenant on %I to capx_api using (exists (select from webhooks w where w.id = %I.webhook_id))',
            name, name
        );
    end loop;
end $$;

-- The delivery of an event to a webhook: sorted by the event's time, and the same whoever makes it.
create function delivery_id(event uuid, webhook uuid) returns uuid language sql immutable parallel safe as $$
    select (left(replace(event::text, '-', ''), 16) || '8' || left(md5(event::text || webhook::text), 15))::uuid
$$;

-- Whether a webhook's patterns take an event in: the name, its family, or everything.
create function webhook_takes(patterns text[], event text) returns boolean language sql immutable parallel safe as $$
    select patterns && array[event, split_part(event, '.', 1) || '.*', '*']
$$;

-- Who is told of an event, in the transaction that writes it: a delivery and its job each. Under
-- the role that sees all webhooks of an account, whichever company the writer is bound to.
create function tell_webhooks() returns trigger language plpgsql set role = capx_system as $$
begin
    if not exists (select from webhooks where status = 'active') then
        return null;
    end if;
    with told as materialized (
        -- Numbered once they are in order, whatever the joins make of that.
        select t.*, nextval(pg_get_serial_sequence('jobs', 'id')) as job_id
        from (
            select w.id as webhook_id, w.ordered, f.company_id, f.event, f.id as event_id, f.xid, f.run_id
            from fresh f
            join companies c on c.id = f.company_id
            join webhooks w on w.account_id = c.account_id and w.status = 'active'
                and (w.company_id is null or w.company_id = f.company_id) and webhook_takes(w.events, f.event)
            order by f.xid, f.id
            offset 0
        ) t
    ),
    delivery as (
        insert into deliveries (webhook_id, id, company_id, event, event_id, event_xid, job_id)
        select webhook_id, delivery_id(event_id, webhook_id), company_id, event, event_id, xid, job_id from told
    ),
    turn as (
        insert into delivery_order (webhook_id, about, job_id)
        select webhook_id, coalesce(run_id, company_id), job_id from told where ordered
    )
    insert into jobs (id, queue, kind, company_id, ref_id, webhook_id, state, timeout_ms)
    overriding system value
    select job_id, 'webhooks', 'delivery', company_id, delivery_id(event_id, webhook_id), webhook_id, 'ready', 60000
    from told;
    return null;
end $$;
create trigger events_tell_webhooks after insert on events
    referencing new table as fresh for each statement execute function tell_webhooks();
