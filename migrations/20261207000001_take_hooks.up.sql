-- What signs the requests that start a playbook; the one before it does too for a while.
alter table triggers
    add column secret bytea check (octet_length(secret) = 32),
    add column old_secret bytea check (octet_length(old_secret) = 32),
    add column old_secret_until timestamptz,
    -- It was shown to somebody, once.
    add column secret_shown boolean not null default false,
    add constraint triggers_rotation check ((old_secret is null) = (old_secret_until is null));

-- The tries of requests from outside that were taken, for as long as they could be sent again by
-- whoever has seen them.
create table hook_calls (
    company_id uuid not null,
    playbook_id uuid not null,
    call_id text not null,
    sent_at bigint not null,
    at timestamptz not null default clock_timestamp(),
    primary key (company_id, playbook_id, call_id, sent_at)
);
create index hook_calls_at on hook_calls (at);
grant select, insert, update, delete on hook_calls to capx_api, capx_system;
alter table hook_calls enable row level security;
alter table hook_calls force row level security;
create policy everything on hook_calls to capx_system using (true) with check (true);
create policy tenant on hook_calls to capx_api
    using (exists (select from companies c where c.id = hook_calls.company_id));
