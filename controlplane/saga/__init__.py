"""The saga kernel: runs lists of steps durably, undoes them when they fail.

`definition` says what a saga is, `log` folds its events into a status, `plan`
says what comes next (both pure), `store` is what the kernel asks of a database,
`runner` claims sagas and executes the plan. Nothing here knows of migrations.
"""
