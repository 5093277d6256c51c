-- Addresses that are told of events, and whose account runs the fleet.

create table webhooks (
    id uuid primary key,
    account_id uuid not null references accounts (id),
    -- Of one company, or of all that the account has.
    company_id uuid,
    url text not null,
    -- Names of events, or patterns such as step.* and *.
    events text[] not null check (cardinality(events) > 0),
    description text,
    status text not null default 'active' check (status in ('active', 'disabled')),
    disabled_reason text,
    -- What signs; the one before it signs too for a while.
    secret bytea not null check (octet_length(secret) = 32),
    old_secret bytea check (octet_length(old_secret) = 32),
    old_secret_until timestamptz,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint webhooks_disabled check ((status = 'disabled') = (disabled_reason is not null)),
    constraint webhooks_rotation check ((old_secret is null) = (old_secret_until is null))
);
create index webhooks_account on webhooks (account_id, id);
create index webhooks_company on webhooks (company_id) where company_id is not null;

grant select, insert, update, delete on webhooks to capx_api, capx_system;
alter table webhooks enable row level security;
alter table webhooks force row level security;
create policy everything on webhooks to capx_system using (true) with check (true);
create policy tenant on webhooks to capx_api
    using (account_id = nullif(current_setting('capx.account', true), '')::uuid
        and (nullif(current_setting('capx.company', true), '') is null
            or company_id = nullif(current_setting('capx.company', true), '')::uuid));

-- Who sees the fleet, and not only what is its own: the account that was there
-- first, since it is whoever set the server up.
alter table accounts add column operator boolean not null default false;
update accounts set operator = true where id = (select id from accounts order by created_at, id limit 1);

-- Dead letters one by one, and by why they are.
create unique index dead_letters_by_id on dead_letters (id);
create index dead_letters_reason on dead_letters (company_id, reason, id);
