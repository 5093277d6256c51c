-- Steps that are done for each item of a list. The run's own job waits while
-- lanes go through the items: each lane is a job of the kind `item`, and `item`
-- says which one it has in hand. The commit of an item hands its lane the next
-- one, or ends the lane; the last lane wakes the run's job.
alter table jobs add column item integer;

create table run_fans (
    company_id uuid not null,
    run_id uuid not null,
    step integer not null,
    -- How often the run had jumped: in a loop, each round has its items.
    round integer not null,
    -- The run's job, which waits.
    job_id bigint not null,
    items integer not null check (items > 0),
    -- The places of those to be done, where it is not all of them.
    todo integer[],
    -- How many have been handed to a lane, of so many.
    begun integer not null,
    size integer not null,
    completed integer not null default 0,
    failed integer not null default 0,
    -- With more failures no other item begins.
    failures_max integer not null,
    lanes integer not null,
    primary key (company_id, run_id, step),
    constraint run_fans_counts check (begun <= size and lanes >= 0 and completed + failed + lanes <= size)
);

create table run_items (
    company_id uuid not null,
    run_id uuid not null,
    step integer not null,
    item integer not null,
    round integer not null,
    status text not null check (status in ('completed', 'failed')),
    agent_id uuid,
    attempt integer not null,
    cost_nanos bigint not null default 0,
    output jsonb,
    error jsonb,
    duration_ms bigint not null,
    ended_at timestamptz not null,
    primary key (company_id, run_id, step, item)
);

grant select, insert, update, delete on run_fans, run_items to capx_api, capx_system;
alter table run_fans enable row level security;
alter table run_fans force row level security;
create policy everything on run_fans to capx_system using (true) with check (true);
create policy tenant on run_fans to capx_api
    using (exists (select from companies c where c.id = run_fans.company_id));
alter table run_items enable row level security;
alter table run_items force row level security;
create policy everything on run_items to capx_system using (true) with check (true);
create policy tenant on run_items to capx_api
    using (exists (select from companies c where c.id = run_items.company_id));
