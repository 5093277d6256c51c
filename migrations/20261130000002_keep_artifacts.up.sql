-- Outputs that are too large to be kept inline, once a company for the same bytes: whole
-- when the row of `artifacts` is there, which is written last.
create table artifacts (
    company_id uuid not null,
    -- Of all its bytes, in lower-case hexadecimal.
    sha256 text not null,
    bytes bigint not null,
    content_type text not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (company_id, sha256)
);
create table artifact_chunks (
    company_id uuid not null,
    sha256 text not null,
    seq integer not null,
    data bytea not null,
    primary key (company_id, sha256, seq)
);
-- Large and often compressed already.
alter table artifact_chunks alter column data set storage external;
-- Which runs have made which.
create table run_artifacts (
    company_id uuid not null,
    run_id uuid not null,
    sha256 text not null,
    bytes bigint not null,
    primary key (company_id, run_id, sha256)
);

do $$
declare
    t text;
begin
    foreach t in array array['artifacts', 'artifact_chunks', 'run_artifacts'] loop
        execute format('grant select, insert, update, delete on %I to capx_api, capx_system', t);
        execute format('alter table %I enable row level security', t);
        execute format('alter table %I force row level security', t);
        execute format('create policy everything on %I to capx_system using (true) with check (true)', t);
        execute format(
            'create policy tenant on %I to capx_api
                 using (exists (select from companies c where c.id = %I.company_id))', t, t);
    end loop;
end
$$;
