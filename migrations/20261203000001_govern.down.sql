alter table runs drop column reviewed;
drop index approvals_waiting;
drop index approvals_call;
alter table approvals
    drop column call_key, drop column edited, drop column on_timeout, drop column escalates_at, drop column reminded;
