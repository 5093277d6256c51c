-- Looks at up to $4 runs behind $1, by their ids, whose times are those of their beginnings; lets those
-- go that ended at least $2 milliseconds ago, or $3 if they failed, with all that is theirs. One that
-- somebody has at this moment, to retry it, stays, and so does one of whose events a webhook may still
-- be told.
with looked as materialized (
    select r.id
    from runs r
    where ($1::uuid is null or r.id > $1)
        and r.id < least_id(now() - least($2::bigint, $3::bigint) * interval '1 millisecond')
    order by r.id limit $4
),
old as materialized (
    select r.id, r.company_id
    from runs r
    where r.id = any (array(select id from looked))
        and r.ended_at < now() - case when r.status = 'failed' then $3::bigint else $2::bigint end * interval '1 millisecond'
        and not exists (
            select from events e
            join companies c on c.id = e.company_id
            join webhooks w on w.account_id = c.account_id
            join deliveries d on d.webhook_id = w.id and d.id = delivery_id(e.id, w.id)
            where e.company_id = r.company_id and e.run_id = r.id and d.status <> 'succeeded'
        )
    for update of r skip locked
),
steps as (delete from run_steps x using old where x.company_id = old.company_id and x.run_id = old.id),
told as (delete from events x using old where x.company_id = old.company_id and x.run_id = old.id),
fans as (delete from run_fans x using old where x.company_id = old.company_id and x.run_id = old.id),
items as (delete from run_items x using old where x.company_id = old.company_id and x.run_id = old.id),
grades as (delete from run_grades x using old where x.company_id = old.company_id and x.run_id = old.id),
children as (delete from run_children x using old where x.company_id = old.company_id and x.run_id = old.id),
kept as (delete from run_artifacts x using old where x.company_id = old.company_id and x.run_id = old.id),
calls as (delete from journal x using old where x.company_id = old.company_id and x.run_id = old.id and x.reserved_nanos = 0),
asked as (delete from approvals x using old where x.company_id = old.company_id and x.run_id = old.id),
waited as (delete from waits x using old where x.run_id = old.id),
letters as (delete from dead_letters x using old where x.company_id = old.company_id and x.ref_id = old.id and x.kind = 'step'),
gone as (delete from runs r using old where r.id = old.id and r.ended_at is not null returning r.id)
select (select id from looked order by id desc limit 1) as "place?", (select count(*) from gone) as "gone!"
