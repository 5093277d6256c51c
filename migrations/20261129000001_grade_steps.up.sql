-- What steps with a rubric have said and what it came to, and at -1 how the limits of
-- the whole run were held. A draft is kept before it is graded, so that it is not made
-- again when a worker dies over it.
create table run_grades (
    company_id uuid not null,
    run_id uuid not null,
    step integer not null,
    -- How often the run had jumped.
    round integer not null,
    stage text not null
        constraint run_grades_stage check (stage in (
            'drafted', 'returned', 'escalated', 'accepted', 'rejected', 'expired', 'passed', 'blocked'
        )),
    -- Drafts so far.
    drafts integer not null,
    -- How often the step was done anew, since it began or was retried.
    returns integer not null,
    -- The draft, as long as somebody is to look at it.
    output jsonb,
    evaluation jsonb,
    primary key (company_id, run_id, step)
);
grant select, insert, update, delete on run_grades to capx_api, capx_system;
alter table run_grades enable row level security;
alter table run_grades force row level security;
create policy everything on run_grades to capx_system using (true) with check (true);
create policy tenant on run_grades to capx_api
    using (exists (select from companies c where c.id = run_grades.company_id));
