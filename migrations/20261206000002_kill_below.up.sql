-- Whether a run belongs to a playbook that was stopped at once, or does a step for one that does,
-- at any height.
create function run_killed(company uuid, run uuid) returns boolean language sql stable as $$
    with recursive above (id) as (
        select run
        union
        select c.run_id from above join run_children c on c.child_id = above.id and c.company_id = company
    )
    select exists (
        select from above
        cross join lateral (select * from runs r where r.company_id = company and r.id = above.id offset 0) r
        cross join lateral (select * from playbooks p where p.company_id = company and p.id = r.playbook_id offset 0) p
        where p.killed_at is not null
    )
$$;
