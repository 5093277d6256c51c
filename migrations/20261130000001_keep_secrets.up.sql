-- Secrets of companies, sealed with a key that is not in the database: a nonce, the
-- ciphertext and its tag.
create table company_secrets (
    company_id uuid not null,
    name text not null,
    -- The id of the key that opens it.
    key_id text not null,
    sealed bytea not null,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    -- The id of the API key that has set it.
    updated_by text not null,
    primary key (company_id, name)
);
grant select, insert, update, delete on company_secrets to capx_api, capx_system;
alter table company_secrets enable row level security;
alter table company_secrets force row level security;
create policy everything on company_secrets to capx_system using (true) with check (true);
create policy tenant on company_secrets to capx_api
    using (exists (select from companies c where c.id = company_secrets.company_id));
