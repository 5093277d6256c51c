-- What agents remember, each by itself and all of a company together, with its last versions.
create table memories (
    company_id uuid not null,
    -- The agent, or the company where it is everybody's.
    owner_id uuid not null,
    key text not null check (octet_length(key) <= 800),
    version integer not null,
    -- Nothing, where it was forgotten.
    value jsonb check (octet_length(value::text) <= 65536),
    is_current boolean not null,
    -- Who has written it, in which run.
    agent_id uuid,
    run_id uuid,
    -- The call that has written it: made again, it writes nothing.
    call_key text,
    written_at timestamptz not null default clock_timestamp(),
    words tsvector generated always as (to_tsvector('simple', key || ' ' || coalesce(value::text, ''))) stored,
    primary key (company_id, owner_id, key, version)
);
create unique index memories_call on memories (company_id, call_key) where call_key is not null;
create index memories_current on memories (company_id, owner_id, key) where is_current;
create index memories_words on memories using gin (words) where is_current;
grant select, insert, update, delete on memories to capx_api, capx_system;
alter table memories enable row level security;
alter table memories force row level security;
create policy everything on memories to capx_system using (true) with check (true);
create policy tenant on memories to capx_api
    using (exists (select from companies c where c.id = memories.company_id));

-- What agents do inside the company is done once for each call.
alter table tasks
    add column call_key text,
    -- The task in whose course it was made.
    add column parent_id uuid;
create unique index tasks_call on tasks (company_id, call_key) where call_key is not null;
create index tasks_parent on tasks (company_id, parent_id) where parent_id is not null;
alter table messages add column call_key text;
create unique index messages_call on messages (company_id, call_key) where call_key is not null;
