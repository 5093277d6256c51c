-- What came of tries of deliveries, under the leases of their jobs: the job goes, or is due again;
-- the try, what became of the delivery, and the dead letter of one that is given up are written with
-- it. Of an ordered webhook the next about the same thing may go.
with d as (
    select * from unnest($1::bigint[], $2::bigint[], $3::uuid[], $4::uuid[], $5::uuid[], $6::text[], $7::bigint[],
        $8::integer[], $9::integer[], $10::text[], $11::text[], $12::uuid[], $13::text[])
        as d (job, epoch, webhook_id, id, company_id, status, delay_ms, answered, latency_ms, answer, error, letter, reason)
),
gone as (
    delete from jobs j using d
    where j.id = any (array[d.job]) and j.lease_epoch = d.epoch and j.session_id = $14 and d.delay_ms is null
    returning j.id, j.attempt, j.crash_count
),
again as (
    update jobs j
    set state = 'scheduled', due_at = now() + d.delay_ms * interval '1 millisecond',
        lease_epoch = j.lease_epoch + 1, session_id = null, deadline_at = null, crash_count = 0
    from d
    where j.id = any (array[d.job]) and j.lease_epoch = d.epoch and j.session_id = $14 and d.delay_ms is not null
    returning j.id, j.attempt, j.crash_count
),
held as materialized (
    select * from gone union all select * from again
),
delivery as (
    update deliveries x
    set status = d.status, attempts = x.attempts + 1, last_status = d.answered, last_error = d.error,
        job_id = case when d.delay_ms is not null then x.job_id end,
        ended_at = case when d.delay_ms is null then now() end,
        failed_at = case when d.status = 'failed' then now() end
    from d join held on held.id = d.job
    where x.webhook_id = any (array[d.webhook_id]) and x.id = d.id
    returning x.webhook_id, x.id, x.attempts
),
attempt as (
    insert into delivery_attempts (webhook_id, delivery_id, number, status, latency_ms, answer, error)
    select d.webhook_id, d.id, x.attempts, d.answered, d.latency_ms, d.answer, d.error
    from d join delivery x on x.webhook_id = d.webhook_id and x.id = d.id
),
letter as (
    insert into dead_letters (company_id, id, queue, kind, ref_id, step, reason, attempt, crash_count, error, webhook_id)
    select d.company_id, d.letter, 'webhooks', 'delivery', d.id, 0, d.reason, held.attempt, held.crash_count,
        jsonb_build_object('class', case when d.reason = 'invalid' then 'invalid' else 'transient' end, 'message', d.error),
        d.webhook_id
    from d join held on held.id = d.job
    where d.letter is not null
)
select id as "id!" from held
