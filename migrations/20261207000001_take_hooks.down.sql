drop table hook_calls;
alter table triggers
    drop constraint triggers_rotation,
    drop column secret_shown,
    drop column old_secret_until,
    drop column old_secret,
    drop column secret;
