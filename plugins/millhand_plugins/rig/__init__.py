"""A simulated motor-bearing-pump skid, served over Modbus or in-process, and the model that knows its faults."""
